"""Pretrained weights as reviewed files: read, described by a card, kept in a store, and loaded into a backbone.

Nothing here uses the network but `download`, and that only when a person asks for it.
"""
