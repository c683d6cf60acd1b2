"""An index of images: built, searched, checked."""
