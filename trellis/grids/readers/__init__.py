"""Readers of mesh formats, one file per format. Each has `read(path) -> Geometry`, which raises DataError with the
reason if the file is damaged or has something that would come out wrong; the reason does not name the file."""
