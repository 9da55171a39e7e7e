"""The HTTP interface: thin handlers, schemas, and the one table from errors to answers."""
