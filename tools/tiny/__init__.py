"""How the embedded model ``tiny`` is made: drawings of our own, training, distillation, evaluation.

Recipes, not part of the engine: they import it, it never imports them. One command each. The model: ``python -m
tools.tiny.draw``, ``train_tokenizers``, ``train_autoencoder``, ``train_classifier``, ``train_flow``, ``distill``,
``evaluate`` and ``sampler_sheet``. What goes with it: ``train_lora`` and ``lora_effect``, ``train_upscaler`` and
``upscaler_gain``, ``train_detector`` and ``detector_accuracy``.
"""
