int apus_kernels_placeholder(void);
