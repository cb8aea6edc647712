"""Tasks that no default was tuned on: real digits, measurements and photographs that packages ship."""
