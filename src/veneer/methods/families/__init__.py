"""Parts that several methods share: LoRA's variants, bottlenecks, experts, second networks, compositions."""
