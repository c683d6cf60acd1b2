"""`blip2 serve`: a page and an OpenAI-compatible API over one model, in one process."""
