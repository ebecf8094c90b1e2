$ create -q -f raw disk 4M
@ -f raw disk
write 0 64k
read -P 0xcd 0 64k
read -P 0 64k 64k
write -P 7 1M 2M
read -P 7 1M 2M
