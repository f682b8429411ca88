"""Say what a file or directory is and whether it is sound."""
