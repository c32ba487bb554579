"""Readers of official files, each with its refusals. coco.py first: people with joints are kept as it does."""
