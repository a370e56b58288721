int apus_linux_placeholder(void);
