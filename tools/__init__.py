"""What `make` needs beside the package."""
