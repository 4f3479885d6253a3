"""Zhang et al. 2017 and Arora et al. 2019 (true and random labels) in the laboratory."""
