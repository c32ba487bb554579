"""Readers of official files, each with its refusals. coco.py first: it holds people with joints as
all others do. joints.py knows the names of joints, weights.py published encoders."""
