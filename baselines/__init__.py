"""The neighbouring methods, each in one file that is read beside its paper.

They share the pictures, the encoder, the run folders and the downstream scripts of this project, so
that a table compares methods and nothing else. parts.py holds what two or more of them need.
"""
