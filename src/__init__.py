"""Atelier: train image generators from scratch on your own pictures, and sample from them."""
