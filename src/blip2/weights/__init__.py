"""Reading and writing of trained weights."""
