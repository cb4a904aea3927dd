"""Glue to other people's trainers; each module imports its package only when it is imported itself.

:mod:`fastcalib.integrations.transformers` serves ``transformers.Trainer`` and TRL's ``SFTTrainer``.
"""
