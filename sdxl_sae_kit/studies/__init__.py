"""Studies: experiments with features that have controls, intervals and an artifact each; none imports another."""
