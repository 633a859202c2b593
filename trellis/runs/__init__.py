"""A run folder, read and written without the trainers."""
