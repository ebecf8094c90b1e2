$ create -q -f raw disk 4M
@ -f raw disk
write -P 9 0 256k
write -z 64k 64k
read -P 0 64k 64k
read -P 9 128k 64k
write -z 511 2
read -P 0 511 2
read -P 9 0 511
