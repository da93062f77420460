"""Secure aggregation: the server learns the sum of a round's updates, and no single one.

`crypto.py` has the primitives, `fixed_point.py` updates as integers; `participant.py` and
`secure_sum.py` are the two sides of the protocol, without Flower; `messages.py` and `client.py` put
them into Flower's messages. What the protocol protects, and what not, is in docs/secure-aggregation.md.
"""
