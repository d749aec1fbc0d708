"""What is added to a picture in a second look at it: detection and detailing. Passes come in as arguments."""
