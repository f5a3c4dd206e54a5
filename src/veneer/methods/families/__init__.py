"""Code that several methods share: LoRA's variants, bottlenecks, experts, side networks, compositions."""
