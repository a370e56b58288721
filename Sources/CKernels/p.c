int apus_kernels_placeholder(void){return 0;}
