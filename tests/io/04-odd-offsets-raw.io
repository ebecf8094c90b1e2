$ create -q -f raw disk 4M
@ -f raw disk
write -P 1 511 2
read -P 1 511 2
read -P 0 0 511
write -P 3 1 1
read -v 0 4
