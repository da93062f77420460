"""Looking at runs while they go on: pages on 127.0.0.1, and a view in the terminal."""
