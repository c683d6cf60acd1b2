"""CapFilt: synthetic captions beside the web text, ranked against the image, the best kept."""
