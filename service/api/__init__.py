"""The wire: routes, schemas, headers and the mapping of errors to statuses."""
