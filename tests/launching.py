"""How several processes that share work are started, without a free port of their own."""

LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--standalone"],
}
