"""The server's half of a round: who takes part, what is asked, what comes of the replies."""
