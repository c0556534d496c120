"""What `benchmark_audit.py` is made of: small stages, a network of audits around them, cheats, and their counts."""
