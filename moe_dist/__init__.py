"""moe_dist: an expert-parallel trainer for sparse mixture-of-experts models.

From the lowest floor to the highest; imports lead down only:

    config, nn                        dataclasses and --set; keyed randomness, token context
    monitoring                        metrics, wandb, step timer
    distributed, data, report         mesh and collectives; text and images; plots and report.html
    moe, optim                        gate, dispatcher, experts; one optimizer for all parameters
    models, engine                    LSTM and transformer models; parallelize, DeepSpeed
    tasks, checkpoint                 data, loss and metrics of a model; files that fit any layout
    training                          set-up, step, resume, NaN detector
    planner, verify, inference        layouts of a cluster; the certificate; trained models in use
"""

__version__ = "0.1.0"
