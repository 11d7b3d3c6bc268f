"""What other tools ask of a trained model."""
