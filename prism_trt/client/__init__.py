"""A gRPC client of the server."""
