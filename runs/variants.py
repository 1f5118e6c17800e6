ZOO = {
    "pairs": ("zoo.hinge", "zoo.squared_hinge", "zoo.cdpo", "zoo.sppo", "zoo.dpop", "zoo.r_dpo"),
    "distillation": ("zoo.odpo", "zoo.rebel"),
}
