"""Speed: ratios that are measured side by side, rates of a machine, whole requests, and an accelerator as a whole."""
