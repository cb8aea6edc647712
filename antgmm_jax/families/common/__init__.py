"""What several families share: text decoders, image encoders, processors, conversion tables."""
