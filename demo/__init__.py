"""The page of Demo.py: what trained models make of images and texts, in a browser."""
