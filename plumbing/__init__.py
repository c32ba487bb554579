"""What every program needs and no paper speaks of: config.py first, then whatever a question names."""
