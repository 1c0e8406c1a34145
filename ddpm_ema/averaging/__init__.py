"""Averages of weights: profiles, the bank that keeps them, and any average after the fact. Needs torch, numpy, safetensors."""
