"""An HTTP front end with the interface of OpenAI's API over the server's gRPC endpoint."""
