"""Load generation by a stranger with an HTTP client: imports neither service nor models."""
