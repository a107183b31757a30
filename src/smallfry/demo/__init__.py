"""Local page to try a trained model on images and watch it think."""
