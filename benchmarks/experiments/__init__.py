"""One-off studies behind a page of the documentation."""
