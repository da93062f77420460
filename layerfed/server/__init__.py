"""The server's half of a round: the cohort, the instructions, and the use of the replies."""
