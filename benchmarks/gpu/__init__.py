"""On a GPU against torchvision: inference, training, reassembly, loading, host synchronizations."""
