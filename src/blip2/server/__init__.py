"""`blip2 serve`: a page and an API."""
