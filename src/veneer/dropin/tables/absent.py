"""What of PEFT the drop-in lacks, and why: each reason with the names that it holds for, as patterns.

A name can be imported all the same; it raises NotInDropIn with the reason when it is used.
"""

from __future__ import annotations

ABSENT: dict[str, str] = {
    "it is for the tensor-parallel layers of Megatron, which veneer does not wrap": """
        peft.tuners.lora.tp_layer.*
    """,
    "it is for the layers of TransformerEngine, whose kernels need a GPU": """
        peft.tuners.lora.te.*
    """,
    "it is a CUDA kernel that is compiled when it is first used; veneer has the same product in torch": """
        peft.tuners.boft.layer.FastBlockDiag
        peft.tuners.boft.layer.get_fbd_cuda
        peft.tuners.boft.layer.patch_environment
    """,
    "it places LoRA on tensor-parallel base layers; veneer trains sharded models with FSDP2": """
        peft.tuners.lora.layer.LoraEmbeddingATPHolder
        peft.tuners.lora.model.add_lora_tp_hooks_dtensor
        peft.tuners.lora.model.get_tp_plan_and_mesh
        peft.utils.integrations.TpInfo
        peft.utils.integrations.dtensor_from_local_like
    """,
    "veneer has one layer for every method and every base, and dispatches to no class of a quantisation library": """
        peft.tuners.*.dispatch_*
        peft.tuners.adalora.gptq.SVDQuantLinear
        peft.tuners.lora.awq.AwqLoraLinear
        peft.tuners.lora.gptq.GPTQLoraLinear
        peft.tuners.lora.torchao.TorchaoLoraLinear
        peft.utils.other.get_gptqmodel_quant_linear
        peft.utils.other.is_gptqmodel_*
    """,
    "veneer reads and writes quantised weights in targets/quantised.py; a layer has no object for its backend": """
        peft.utils.quantization_utils.*Backend
        peft.utils.quantization_utils.LayerType
        peft.utils.quantization_utils.get_quantization_kwargs
        peft.utils.quantization_utils.quantization_extra_repr
        peft.utils.quantization_utils.resolve_quantization_backend
    """,
    "it is a part of PEFT's layers; in veneer the mathematics of a method is one file in veneer/methods": """
        peft.tuners.adalora.layer.RankAllocator
        peft.tuners.adaption_prompt.config.*
        peft.tuners.adaption_prompt.layer.*
        peft.tuners.adaption_prompt.utils.*
        peft.tuners.boft.layer.MultiplicativeDropoutLayer
        peft.tuners.c3a.utils.*
        peft.tuners.glora.layer.Glora*Path
        peft.tuners.loha.layer.HadaWeight*
        peft.tuners.lora.arrow.ArrowLoraLinearLayer
        peft.tuners.lora.arrow.check_loaded_lora_compatibility_arrow
        peft.tuners.lora.arrow.ensure_adapters_target_linear_layers_only
        peft.tuners.lora.dora.Dora*Layer
        peft.tuners.lora.dora.cache_decorator
        peft.tuners.lora.layer.LoraVariant
        peft.tuners.lora.layer._LoraFactorsProxy
        peft.tuners.lora.monteclora.BufferedMontecloraSampler
        peft.tuners.oft.layer.MultiplicativeDropoutLayer
        peft.tuners.oft.layer.OFTRotationModule
        peft.tuners.poly.router.*Router
        peft.tuners.poly.router.get_router
        peft.tuners.psoft.layer.OrthLayer
        peft.tuners.randlora.layer.UniqueBaseGrad
        peft.tuners.shadow.layers.ShadowCarrier
        peft.tuners.xlora.classifier.*
        peft.tuners.xlora.layer.XLora*Layer
        peft.tuners.xlora.model.convert_layers_to_xlora
    """,
    "it is a step of an initialiser that veneer takes as a whole (initialize_lora_eva_weights, preprocess_corda, "
    "preprocess_loraga, AdaMSS's own)": """
        peft.tuners.adamss.utils.*
        peft.tuners.lora.corda.CordaEigens
        peft.tuners.lora.corda.c*
        peft.tuners.lora.eva.*Hook
        peft.tuners.lora.loraga.estimate_gradients
        peft.utils.loftq_utils.loftq_init
    """,
    "a method is added to veneer as one file in veneer/methods": """
        peft.utils.peft_types.register_peft_method
    """,
    "veneer's wavelets are in veneer/maths/wavelet.py": """
        peft.tuners.waveft.wavelet.*
        peft.tuners.waveft.waverec2d.*
    """,
    "shadows of diffusion models are not supported": """
        peft.tuners.shadow.diffusion_models.*
    """,
    "it converts names of parameters for a transformers that veneer/upstream handles by itself": """
        peft.utils.transformers_weight_conversion.FlattenDims
        peft.utils.transformers_weight_conversion.P*
    """,
    "veneer's splice of prompts makes the mask (core/prompt.py)": """
        peft.utils.other.create_attention_mask
    """,
    "attaching an adapter adds the modules that it trains as a whole": """
        peft.utils.other.set_additional_trainable_modules
    """,
}

ABSENT_ATTRIBUTES: dict[str, str] = {
    "a variant of LoRA is a class of adapters in veneer/methods, composed by the config that asks for it": """
        peft.tuners.lora.variants.*Variant.*
        peft.tuners.*.*.lora_variants
        peft.tuners.*.*.resolve_lora_variant
    """,
    "an adapter initialises itself when it is attached, as its config says": """
        peft.tuners.*.*_init
        peft.tuners.lo[hk][ar]*.create_adapter_parameters
        peft.tuners.lycoris_utils.LycorisLayer.create_adapter_parameters
        peft.utils.other.*.init_modules
        peft.utils.other.*.check_module
    """,
    "it is a part of the formula, which is in veneer/methods": """
        peft.tuners.boft.layer.*.perm2mat
        peft.tuners.boft.layer.*.block_butterfly_perm
        peft.tuners.boft.layer.*.cayley_batch
        peft.tuners.cpt.model.CPTEmbedding.*
        peft.tuners.lora.layer.ParamWrapper.get_delta_factors
        peft.tuners.lora.monteclora.MontecloraSampler.*
        peft.tuners.miss.layer.MissLinear.get_delta_weight_miss
        peft.tuners.oft.layer.*.adjust_oft_parameters
        peft.tuners.randlora.*.get_scaled_bases
        peft.tuners.shadow.layers.ShadowLayer.shadow_*
        peft.tuners.shadow.model.ShadowModel.shadow_auxiliary_loss
        peft.tuners.trainable_tokens.layer.TrainableTokensLayer.*
        peft.tuners.unilora.*.update_scaling
        peft.tuners.unilora.model.UniLoraModel.generate_index
        peft.tuners.xlora.layer.XLoraLayer.*
    """,
    "a wrapper of trained copies or tokens is the same layer as any other; see its adapters": """
        peft.utils.other.*.adapter_state_dict
        peft.utils.other.*.adapter_state_dict_load_map
        peft.utils.other.*.check_set_adapter
        peft.utils.other.*.update
        peft.utils.other.*.unload_and_optionally_merge_module
        peft.utils.other.TrainableTokensWrapper.original_module
        peft.tuners.*.layer.*.unload_and_optionally_merge_module
    """,
    "an adapter whose ranks were pruned is loaded as it is": """
        peft.tuners.adalora.model.AdaLoraModel.resize_*
    """,
    "a prompt in veneer is a Prompt (core/prompt.py), seen through model.prompt_encoder": """
        peft.tuners.cartridge.model.CartridgeEncoder.*
        peft.tuners.prefix_tuning.model.PrefixEncoder.*
    """,
    "it belongs to caches of transformers before version 5": """
        peft.tuners.shadow.layers.ShadowCache.*
    """,
    "the field is an empty dict by default, not None": """
        peft.tuners.osf.config.OSFConfig.rank_pattern
        peft.tuners.xlora.config.XLoraConfig.adapters
    """,
}
"""The same for attributes and methods of classes, given as module, class and attribute."""

OTHER_PARAMETERS: dict[str, str] = {
    "one method serves the layers of all methods: settings go by keyword, or are in the config": """
        peft.tuners.*.update_layer
        peft.tuners.*.get_delta_weight
        peft.tuners.*.reset_*
        peft.tuners.glora.layer.*.unmerge
        peft.tuners.ln_tuning.layer.LNTuningLayer.merge
    """,
    "a layer passes all arguments on to the module that it wraps, whatever their names": """
        peft.tuners.*.forward
        peft.utils.other.*.forward
    """,
    "an empty dict stands for None, and None for an empty dict": """
        peft.tuners.lora.config.LoraConfig
        peft.tuners.adalora.config.AdaLoraConfig
        peft.tuners.osf.config.OSFConfig
        peft.tuners.xlora.config.XLoraConfig
    """,
    "without a config it cannot be made": """
        peft.peft_model.PeftModelForTokenClassification
    """,
    "it is the flag of the wrapped module": """
        peft.tuners.lora.layer.MultiheadAttention.merge_masks
    """,
    "experts are loaded onto the devices of their layers": """
        peft.tuners.xlora.model.XLoraModel
    """,
    "it is made by attaching an adapter, never by calling its class": """
        peft.tuners.cartridge.model.CartridgeEncoder
        peft.tuners.cpt.model.CPTEmbedding
        peft.tuners.multitask_prompt_tuning.model.MultitaskPromptEmbedding
        peft.tuners.p_tuning.model.PromptEncoder
        peft.tuners.prefix_tuning.model.PrefixEncoder
        peft.tuners.prompt_tuning.model.PromptEmbedding
        peft.tuners.shadow.layers.DetachedShadowModel
        peft.tuners.shadow.layers.ShadowCache*
        peft.utils.other.*Wrapper
    """,
    "PEFT refuses to save a mixed model, and to unmerge an OSF": """
        peft.mixed_model.PeftMixedModel.save_pretrained
        peft.tuners.osf.model.OSFModel.unmerge_adapter
    """,
    "every composition is saved in one format": """
        peft.tuners.cartridge.utils.compose_cartridge_adapters
    """,
}
"""Classes, functions and methods whose parameters differ from PEFT's, and why."""
