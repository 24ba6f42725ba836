"""Atelier: train image generators from scratch on your own images, and sample from them."""
