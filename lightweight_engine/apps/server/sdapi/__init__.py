"""The HTTP interface of AUTOMATIC1111 and Forge, for the clients that speak it."""
