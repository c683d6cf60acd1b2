"""A page that shows where a bridge looks."""
