"""Makes a plain model parallel and hands its dense parameters to DeepSpeed."""
