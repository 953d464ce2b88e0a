"""ABSGD inside the trainers of other packages: who divides the loss, finishes the normaliser, clips and saves, per framework.

One module for each framework; docs/integrations.md has the changed lines.

    absgd_fast.integrations.transformers    `RobustTrainerMixin` for Transformers' Trainer and TRL's SFTTrainer
    absgd_fast.integrations.lightning       `RobustCallback` for Lightning's Trainer
    absgd_fast.integrations.accelerate      `Robust` for a loop with an Accelerator

A module can be imported only where its framework is installed. Nothing else of absgd_fast imports these modules, so the package
itself needs torch alone. `pip install absgd_fast[integrations]` installs the frameworks.
"""
